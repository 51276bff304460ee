"""Ray's session, resources and devices."""
