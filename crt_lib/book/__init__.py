"""The notebooks as a batch job."""
