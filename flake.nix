{
  description = "onewan, a trainer for the Wan 2.2 video models";

  # flake.lock has the revisions that the lock file of uv2nix has, whose tests use both.
  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    pyproject-nix = {
      url = "github:pyproject-nix/pyproject.nix";
      inputs.nixpkgs.follows = "nixpkgs";
    };
  };

  outputs =
    {
      self,
      nixpkgs,
      pyproject-nix,
    }:
    let
      inherit (nixpkgs) lib;

      # What PyTorch supports there. On aarch64-darwin the CPU build has Apple's GPUs too.
      acceleratorsOf = {
        x86_64-linux = [
          "cpu"
          "cuda"
          "rocm"
        ];
        aarch64-linux = [
          "cpu"
          "cuda"
        ];
        aarch64-darwin = [ "cpu" ];
      };

      # CUDA's libraries are not free software, so that they have to be allowed.
      configOf = {
        cpu = { };
        cuda = {
          allowUnfree = true;
          cudaSupport = true;
        };
        rocm.rocmSupport = true;
      };

      buildFor =
        system: accelerator:
        let
          pkgs = import nixpkgs {
            inherit system;
            config = configOf.${accelerator};
          };
          environments = import ./nix/python.nix {
            inherit
              lib
              pkgs
              pyproject-nix
              accelerator
              ;
            root = ./.;
          };
        in
        import ./nix/outputs.nix {
          inherit
            lib
            pkgs
            environments
            accelerator
            ;
          source = self;
        };

      # name -> value of every accelerator of a system, and the CPU's as "default".
      outputsOf =
        system: kind:
        let
          each = lib.genAttrs acceleratorsOf.${system} (accelerator: (buildFor system accelerator).${kind});
        in
        each // { default = each.cpu; };
      forAllSystems = lib.genAttrs (lib.attrNames acceleratorsOf);
    in
    {
      packages = forAllSystems (system: outputsOf system "package");
      apps = forAllSystems (system: outputsOf system "app");
      devShells = forAllSystems (system: outputsOf system "shell");
      # The CPU's only: they need no accelerator, and nothing of CUDA or ROCm is built for them.
      checks = forAllSystems (system: (buildFor system "cpu").checks);
      formatter = forAllSystems (system: (import nixpkgs { inherit system; }).nixfmt-tree);
    };
}
