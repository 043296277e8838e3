"""The commands of `crt`, in groups."""
