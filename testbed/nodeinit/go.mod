module godwit.io/testbed/nodeinit

go 1.24
