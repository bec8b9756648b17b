{
  description = "As much of nixpkgs as onewan's flake needs to be evaluated; nothing in it can be built";

  outputs = _: { lib = import ./lib.nix; };
}
