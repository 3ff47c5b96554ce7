"""Sites: small fx graphs at the places that a program touches, and the few edits that methods share."""
