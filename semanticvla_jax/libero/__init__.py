"""LIBERO: its suites, simulator, demonstrations, recorded episodes and the checks of an installation."""
