"""Blobs by digest, in files or in a bucket, and the leases that keep them."""
