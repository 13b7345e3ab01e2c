"""From an image request to the stored image: recipe, queue, pipeline, index."""
