"""A row's seeds beside its published figures: medians, ranges, differences and the verdict."""
