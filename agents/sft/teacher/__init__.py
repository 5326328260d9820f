"""Teachers: they turn a student's box and the target into a corrective trace."""
