"""What several test files share: references, models, data, random expressions, plugins and measurements."""
