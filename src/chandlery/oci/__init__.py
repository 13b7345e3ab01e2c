"""The nouns of the OCI specifications: digests, descriptors, manifests, layouts."""
