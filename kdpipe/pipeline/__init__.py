"""What runs when: plan, status, runner, identities and runs."""
