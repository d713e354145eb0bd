"""UDP echo on port 7000: one socket, both address families."""

from __future__ import annotations

import socket

echo = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
echo.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
echo.bind(("::", 7000))
while True:
    data, sender = echo.recvfrom(65536)
    echo.sendto(data, sender)
