"""The cloud coordinator and the operator's command line."""
