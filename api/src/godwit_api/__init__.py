"""Types that operator, node agent and command line share; imports nothing of ours."""
