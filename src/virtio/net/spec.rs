//! Numbers of the network device (virtio 1.2 §5.1).

/// Device number (§5).
pub const ID: u32 = 1;

/// Feature bits (§5.1.3).
pub mod feature {
    /// The device takes packets with checksums that are not complete.
    pub const CSUM: u64 = 1 << 0;
    /// The driver takes such packets.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// The driver may change what it takes while it runs.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// `mtu` holds.
    pub const MTU: u64 = 1 << 3;
    /// `mac` holds.
    pub const MAC: u64 = 1 << 5;
    /// The driver takes large TCP packets over IPv4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// The driver takes large TCP packets over IPv6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// The driver takes large TCP packets with ECN.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// The device takes large TCP packets over IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The device takes large TCP packets over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// The device takes large TCP packets with ECN.
    pub const HOST_ECN: u64 = 1 << 13;
    /// A received packet may be spread over several chains.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// There is a control queue.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// There are several pairs of queues.
    pub const MQ: u64 = 1 << 22;
    /// The driver takes large UDP packets over IPv4, segmented (virtio 1.3).
    pub const GUEST_USO4: u64 = 1 << 54;
    /// The driver takes large UDP packets over IPv6, segmented (virtio 1.3).
    pub const GUEST_USO6: u64 = 1 << 55;
    /// The device takes large UDP packets, segmented (virtio 1.3).
    pub const HOST_USO: u64 = 1 << 56;
}

/// Where `flags` lies in the header before each packet (§5.1.6).
pub const HEADER_FLAGS: u32 = 0;
/// Where `num_buffers` lies in the header before each packet (§5.1.6).
pub const HEADER_NUM_BUFFERS: u32 = 10;

/// Commands of the control queue (§5.1.6.5): class and command.
pub mod command {
    /// How many pairs of queues are used (§5.1.6.5.6.1).
    pub const MQ_PAIRS_SET: [u8; 2] = [4, 0];
    /// What the driver takes (§5.1.6.5.8).
    pub const GUEST_OFFLOADS_SET: [u8; 2] = [5, 0];
}

/// Answers of the control queue (§5.1.6.5).
pub mod ack {
    /// Done.
    pub const OK: u8 = 0;
    /// Refused.
    pub const ERR: u8 = 1;
}
