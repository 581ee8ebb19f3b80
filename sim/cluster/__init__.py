"""What happens when, on SimPy: clients, the front end and an engine on one clock."""
