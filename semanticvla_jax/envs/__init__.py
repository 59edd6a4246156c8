"""What a policy acts in: environments that know no model."""
