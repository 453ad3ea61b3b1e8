"""A folder to ship: files, reports, golden images, sums and a signature; and its check."""
