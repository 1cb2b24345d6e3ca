"""What a user sets: strings parsed once, configs and rules, flat arguments, and errors that name the field. Knows neither torch nor
transformers."""
