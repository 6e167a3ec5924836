"""How the mini world was made: every network trained again from a seed."""
