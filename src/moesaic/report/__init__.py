"""Pictures and pages: self-contained HTML."""
