"""What a person sees: live progress, the report page, the results table, the doctor."""
