"""A rehearsal: a row's whole way at its real sizes, in minutes, on stand-in data and in a folder that is deleted."""
