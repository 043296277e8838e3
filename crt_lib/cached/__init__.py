"""One token of each row at a time: what is kept for it, and the model without its modules."""
