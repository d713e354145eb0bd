"""Answers every datagram to port 7007 by its number and content."""

import socket

server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
server.bind(("0.0.0.0", 7007))
ready = socket.create_server(("0.0.0.0", 7000))  # for the probe
number = 0
while True:
    data, caller = server.recvfrom(65536)
    number += 1
    server.sendto(b"%d %s" % (number, data), caller)
