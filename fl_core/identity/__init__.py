"""Who is who: device keys, the fleet's certificate authority, signed request headers. cryptography only."""
