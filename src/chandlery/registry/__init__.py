"""The OCI distribution API, /v2: requests in, images and blobs out."""
