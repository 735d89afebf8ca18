"""Plans that go over the data in every product."""
