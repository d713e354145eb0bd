"""Generated from api/proto; see scripts/generate-stubs."""
