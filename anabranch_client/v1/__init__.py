"""The generated messages and stubs of `anabranch.v1`; `scripts/generate-stubs` makes them."""
