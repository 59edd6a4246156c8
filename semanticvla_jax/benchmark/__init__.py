"""What can be measured on the machine at hand, always as a ratio to something measured in the same run."""
