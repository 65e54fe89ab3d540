//! Messages of our own.

use std::net::IpAddr;

use crate::avp::{AVP_MANDATORY, FLAG_PROXIABLE, FLAG_REQUEST, HEADER_BYTES, code};

/// Appends a message to a buffer, AVP by AVP.
#[derive(Debug)]
pub struct Builder<'a> {
    out: &'a mut Vec<u8>,
    start: usize,
}

impl<'a> Builder<'a> {
    /// Begins a message.
    pub fn new(
        out: &'a mut Vec<u8>,
        flags: u8,
        command: u32,
        application: u32,
        hop_by_hop: u32,
        end_to_end: u32,
    ) -> Self {
        let start = out.len();
        out.extend_from_slice(&[1, 0, 0, 0, flags]);
        out.extend_from_slice(&command.to_be_bytes()[1..]);
        for number in [application, hop_by_hop, end_to_end] {
            out.extend_from_slice(&number.to_be_bytes());
        }
        Self { out, start }
    }

    /// Begins a request that may be relayed.
    pub fn request(
        out: &'a mut Vec<u8>,
        command: u32,
        application: u32,
        hop_by_hop: u32,
        end_to_end: u32,
    ) -> Self {
        Self::new(out, FLAG_REQUEST | FLAG_PROXIABLE, command, application, hop_by_hop, end_to_end)
    }

    /// Appends an AVP of the base protocol with the M flag.
    pub fn bytes(self, code: u32, data: &[u8]) -> Self {
        self.avp(code, AVP_MANDATORY, data)
    }

    /// Appends an AVP of the base protocol.
    pub fn avp(self, code: u32, flags: u8, data: &[u8]) -> Self {
        append(self.out, code, flags, data);
        self
    }

    /// Appends text.
    pub fn text(self, code: u32, text: &str) -> Self {
        self.bytes(code, text.as_bytes())
    }

    /// Appends an Unsigned32.
    pub fn number(self, code: u32, number: u32) -> Self {
        self.bytes(code, &number.to_be_bytes())
    }

    /// Appends an Address.
    pub fn address(self, code: u32, address: IpAddr) -> Self {
        let mut data = [0; 18];
        let length = match address {
            IpAddr::V4(address) => {
                data[1] = 1;
                data[2..6].copy_from_slice(&address.octets());
                6
            }
            IpAddr::V6(address) => {
                data[1] = 2;
                data[2..18].copy_from_slice(&address.octets());
                18
            }
        };
        self.bytes(code, &data[..length])
    }

    /// Appends an application: a vendor's in a group with its vendor (RFC 6733 6.11).
    pub fn application(self, application: u32) -> Self {
        const VENDOR_3GPP: u32 = 10_415;
        const FIRST_OF_VENDORS: u32 = 0x0100_0000;
        const RELAY: u32 = 0xffff_ffff;
        if application < FIRST_OF_VENDORS || application == RELAY {
            return self.number(code::AUTH_APPLICATION_ID, application);
        }
        let mut group = Vec::with_capacity(24);
        append(&mut group, code::VENDOR_ID, AVP_MANDATORY, &VENDOR_3GPP.to_be_bytes());
        append(&mut group, code::AUTH_APPLICATION_ID, AVP_MANDATORY, &application.to_be_bytes());
        self.bytes(code::VENDOR_SPECIFIC_APPLICATION_ID, &group)
    }

    /// Appends AVPs as they are.
    pub fn raw(self, avps: &[u8]) -> Self {
        self.out.extend_from_slice(avps);
        self
    }

    /// Writes the length.
    pub fn finish(self) {
        let length = (self.out.len() - self.start) as u32;
        debug_assert!(length as usize >= HEADER_BYTES);
        self.out[self.start + 1..self.start + 4].copy_from_slice(&length.to_be_bytes()[1..]);
    }
}

/// Appends an AVP without vendor, padded.
pub fn append(out: &mut Vec<u8>, code: u32, flags: u8, data: &[u8]) {
    let length = (8 + data.len()) as u32;
    out.extend_from_slice(&code.to_be_bytes());
    out.push(flags);
    out.extend_from_slice(&length.to_be_bytes()[1..]);
    out.extend_from_slice(data);
    // Relative to the data: what stands before in the buffer need not be a multiple of four.
    out.resize(out.len() + (data.len().next_multiple_of(4) - data.len()), 0);
}
