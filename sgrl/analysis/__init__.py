"""Results as statistics, figures, tables and reports."""
