"""Label caches: building, verifying, writing through, importing FKD's."""
