"""What this project costs, and what it does on a machine. A package, so that none of the same name takes its place."""
