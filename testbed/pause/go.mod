module godwit.io/testbed/pause

go 1.24
