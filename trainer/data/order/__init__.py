"""Which block is sample t: a pure function of the seed, in closed form."""
