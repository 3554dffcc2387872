"""Which run fits, and why each of its values was chosen."""
