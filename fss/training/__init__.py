"""From a configuration to a measured run."""
