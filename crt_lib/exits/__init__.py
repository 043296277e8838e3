"""Early exit: criteria, the gate, traces, and decoding one token at a time with exits."""
