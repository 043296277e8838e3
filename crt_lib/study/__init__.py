"""Questions to many trainings, and the paper's claims."""
