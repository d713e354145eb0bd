"""The pod's network in the freeze and after it: packets, routes, addresses, connections."""
