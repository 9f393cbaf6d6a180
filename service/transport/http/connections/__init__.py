"""HTTP connections: what may come over one, in which time, and over how many.

uvicorn's protocol reads requests and runs the application. What it leaves open is here: limits on
the head of a request and on what surrounds its body (`head`, `reading`), on the time that a client
may take to send or to read (`deadlines`), and on the number of connections (`held`); errors of the
protocol in the form of all others (`refusals`, `application`); answers that leave in one piece
(`answers`). `connection` has them all, and `over_tls` shakes hands before.
"""
