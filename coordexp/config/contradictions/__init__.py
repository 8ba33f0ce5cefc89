"""Settings that the schema takes one by one and that no run can mean together."""
