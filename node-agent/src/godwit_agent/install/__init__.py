"""Prepares a node for Godwit, and undoes it.

``python -m godwit_agent.install install`` runs as the agent's init container,
``retire`` as the job that ``helm uninstall`` starts first.
"""
