"""The chip on a Lattice ECP5: synthesis, place and route, and a report of what it takes and how fast it is."""
