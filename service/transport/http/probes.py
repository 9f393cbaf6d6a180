"""Which requests are probes, which have a connection when nobody has one, and need no key?"""

PROBES = (b"/health/", b"/v2/health/")  # as their URLs begin
