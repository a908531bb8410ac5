"""Exits with an error unless the service answers, where HOST and PORT say that it listens."""

import http.client
import os
import sys

host = os.environ.get("HOST") or "localhost"
if host in ("0.0.0.0", "::"):
    host = "localhost"
service = http.client.HTTPConnection(host, int(os.environ.get("PORT") or 5000), 10)
service.request("GET", "/health")
sys.exit(service.getresponse().status != 200)
