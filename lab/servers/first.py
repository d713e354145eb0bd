"""Asks ``http://ADDRESS:PORT/PATH`` until it is answered with 200; prints what it says.

``first.py ADDRESS PORT PATH [SECONDS]``. Prints ``ready`` when it begins.
"""

from __future__ import annotations

import http.client
import sys
import time


def main() -> int:
    """Command line entry; 1 when nobody answers in time."""
    address, port, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    end = time.monotonic() + float(sys.argv[4] if len(sys.argv) > 4 else "120")
    print("ready", flush=True)
    while time.monotonic() < end:
        # An attempt that comes too early must not be what is waited for; a request that has
        # arrived counts.
        connection = http.client.HTTPConnection(address, port, timeout=1)
        try:
            connection.connect()
            connection.sock.settimeout(60)
            connection.request("GET", path)
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status == 200:
                print(text.strip(), flush=True)
                return 0
        except (OSError, http.client.HTTPException):
            pass
        finally:
            connection.close()
        time.sleep(0.02)
    return 1


if __name__ == "__main__":
    sys.exit(main())
