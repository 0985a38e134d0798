"""What a user looks at: overlays, tables, pages."""
