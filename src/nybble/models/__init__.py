"""Where models come from (sources) and what is known of their structure (adapters, as data)."""
