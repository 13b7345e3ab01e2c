"""`make demo`: a server, a client and a sandbox that show everything at once, apart from the product."""
